"""`python -m persona` is `persona`."""

from persona.cli import main

if __name__ == "__main__":
    main()
