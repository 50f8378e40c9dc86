"""For commands that tests run as processes of their own, with this folder on PYTHONPATH."""

import sys
from importlib.abc import MetaPathFinder

from torchvision_operators import declare


class BeforeTorchvision(MetaPathFinder):
    """Declares what torchvision needs when it is about to be imported, so that others do without torch."""

    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            declare()


sys.meta_path.insert(0, BeforeTorchvision())
