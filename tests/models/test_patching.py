"""What contexts and others put in the place of somebody else's functions."""

from functools import wraps
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
