"""What contexts and others put in the place of somebody else's functions."""

from functools import partial
from threading import Thread
from types import SimpleNamespace

from convsim_init.tracking.patching import observed


def noting(owner, letter):
    """Context that notes calls of a function with a letter, before and after them."""
    note = owner.noted.append
    return observed(owner, "name", before=partial(note, letter), after=partial(note, letter))


def calls_of(owner):
    """What a call of the function notes, itself as a dot."""
    owner.noted.clear()
    owner.name()
    return "".join(owner.noted)


def owner_of_a_function(kind=SimpleNamespace):
    owner = kind()
    owner.noted = []
    owner.name = partial(owner.noted.append, ".")
    return owner


def test_arguments_and_the_result_are_passed_on():
    owner, seen = SimpleNamespace(name=divmod), []
    with observed(owner, "name", before=lambda *given: seen.append(given), after=lambda *given: seen.append(given)):
        assert owner.name(7, 2) == (3, 1)
    assert seen == [(7, 2), (7, 2)]
    assert owner.name is divmod


def test_a_context_may_end_within_a_call():
    owner = owner_of_a_function()
    one = noting(owner, "1")
    with observed(owner, "name", before=lambda: one.__exit__(None, None, None)):
        one.__enter__()
        assert calls_of(owner) == "1.1"
        assert calls_of(owner) == "."


def test_contexts_end_in_any_order():
    owner = owner_of_a_function()
    before = owner.name
    one, two = noting(owner, "1"), noting(owner, "2")
    with one:
        two.__enter__()
        assert calls_of(owner) == "21.12"
    assert calls_of(owner) == "2.2"
    two.__exit__(None, None, None)
    assert owner.name is before


def test_what_others_put_there_meanwhile_stays_and_goes_on():
    owner = owner_of_a_function()
    before = owner.name
    one, two = noting(owner, "1"), noting(owner, "2")
    with one:
        under_it = owner.name

        def patch():
            owner.noted.append("a")
            under_it()

        owner.name = patch
        two.__enter__()
        assert calls_of(owner) == "2a1.12"
    assert calls_of(owner) == "2a.2"
    two.__exit__(None, None, None)
    assert owner.name is patch
    assert calls_of(owner) == "a."
    owner.name = under_it  # taken off again
    with noting(owner, "3"):
        assert calls_of(owner) == "3.3"
    assert owner.name is before


def test_a_context_may_begin_in_a_thread_while_another_ends():
    class Owner:
        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if name == "name" and beginning:
                beginning.pop().start()
                other.join(0.2)  # or until it waits for this one
            return value

    beginning, owner = [], owner_of_a_function(Owner)
    before = owner.name
    one, two = noting(owner, "1"), noting(owner, "2")
    other = Thread(target=two.__enter__)
    with one:
        beginning.append(other)
    other.join()
    assert calls_of(owner) == "2.2"
    two.__exit__(None, None, None)
    assert owner.name is before
