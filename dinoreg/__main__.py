"""`python -m dinoreg` is the command `dinoreg`."""

from dinoreg.commands.main import entry

if __name__ == "__main__":
    entry()
