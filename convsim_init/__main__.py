"""``python -m convsim_init`` is the command ``convsim-init``."""

from convsim_init.cli.main import main

if __name__ == "__main__":
    main()
