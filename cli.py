"""The command line: ``python cli.py --help`` says what it can do."""

import sys

from lwf_lightning.cli_help import answer_at_once

if __name__ == "__main__":
    answer_at_once(sys.argv[1:])
    if sys.argv[1] == "study":
        from lwf_lightning.study.command import main as study

        study(sys.argv[2:])
    else:
        from lwf_lightning.cli import main

        main()
