"""The house rules that are hard limits."""

from benchmarks.coverage import house


def test_no_folder_is_crowded():
    assert house.crowded_folders() == {}


def test_a_crowded_folder_is_found(monkeypatch):
    monkeypatch.setattr(house, "MOST_AT_THE_TOP", 5)
    assert list(house.crowded_folders()) == ["convsim_init"]


def test_only_full_lines_count_as_comments():
    assert house.COMMENTS[".py"].findall("# one\nx = 1  # not\n    # two\n") == ["# one", "    # two"]
    (block, line) = house.COMMENTS[".c"].findall("/* one\n   two */\nx = *y; /* not */\n#if\n  // three\n*z = 1;\n")
    assert (block, line) == ("/* one\n   two */", "  // three")


def test_it_prints(capsys):
    house.main()
    assert "library, command and C" in capsys.readouterr().out
