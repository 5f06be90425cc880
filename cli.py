"""The command line: fit, validate, test, predict, elicit and score."""

from lwf_lightning.cli import main

if __name__ == "__main__":
    main()
