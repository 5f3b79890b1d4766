"""The command: `python -m ptq_exp`."""

from ptq_exp.cli.main import main

if __name__ == "__main__":
    main()
