"""How redundant the filters of a layer or a model are."""
