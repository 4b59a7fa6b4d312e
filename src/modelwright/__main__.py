"""``python -m modelwright``."""

from modelwright.cli import main

if __name__ == "__main__":
    main()
