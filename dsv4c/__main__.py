"""`dsv4c`, and `python -m dsv4c`."""

import signal


def main() -> None:
    """Entry point of the `dsv4c` command. Until it is loaded, Ctrl-C has nothing to clean up."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    from dsv4c.cli import main as command  # takes a moment, in which Ctrl-C shall end quietly

    command()


if __name__ == "__main__":
    main()
