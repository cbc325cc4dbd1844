"""Artifact tokens, what registers do and hold: the measurements of the register report, and its page.

The package is called as a function: `dinoreg.registers(weights, images)`, see `dinoreg.commands.registers.registers`.
"""

import sys

import dinoreg

sys.modules[__name__].__class__ = dinoreg.CalledPackage
