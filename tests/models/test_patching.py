"""What contexts and others put in the place of somebody else's functions."""

from functools import wraps
from threading import Thread
from types import SimpleNamespace

from convsim_init.models.patching import replaced


def appending(letter):
    def change(before):
        @wraps(before)
        def changed():
            return before() + letter

        return changed

    return change


def test_contexts_end_in_any_order():
    owner = SimpleNamespace(name=lambda: "")
    before = owner.name
    one, two = replaced(owner, "name", appending("1")), replaced(owner, "name", appending("2"))
    with one:
        two.__enter__()
        assert owner.name() == "12"
    assert owner.name() == "2"
    two.__exit__(None, None, None)
    assert owner.name is before


def test_what_others_put_there_meanwhile_stays_and_goes_on():
    owner = SimpleNamespace(name=lambda: "")
    before = owner.name
    one, two = replaced(owner, "name", appending("1")), replaced(owner, "name", appending("2"))
    with one:
        under_it = owner.name
        owner.name = patch = appending("a")(under_it)
        two.__enter__()
        assert owner.name() == "1a2"
    assert owner.name() == "a2"
    two.__exit__(None, None, None)
    assert owner.name is patch
    assert owner.name() == "a"
    owner.name = under_it  # taken off again
    with replaced(owner, "name", appending("3")):
        assert owner.name() == "3"
    assert owner.name is before


def test_a_context_may_begin_in_a_thread_while_another_ends():
    class Owner:
        def __getattribute__(self, name):
            value = super().__getattribute__(name)
            if beginning:
                beginning.pop().start()
                other.join(0.2)  # or until it waits for this one
            return value

    beginning, owner = [], Owner()
    owner.name = str
    one, two = replaced(owner, "name", appending("1")), replaced(owner, "name", appending("2"))
    other = Thread(target=two.__enter__)
    with one:
        beginning.append(other)
    other.join()
    assert owner.name() == "2"
    two.__exit__(None, None, None)
    assert owner.name is str
