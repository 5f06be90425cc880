"""The command line: ``python cli.py --help`` says what it can do."""

import sys

from lwf_lightning.cli_help import answer_at_once

if __name__ == "__main__":
    answer_at_once(sys.argv[1:])
    from lwf_lightning.cli import main

    main()
