"""`python -m p2pllm`, and the `p2pllm` command."""

from p2pllm.cli.app import program


def main() -> None:
    """Run the command line; exits with its code."""
    program(prog_name="p2pllm")


if __name__ == "__main__":
    main()
