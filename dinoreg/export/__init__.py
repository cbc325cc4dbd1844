"""Exporting a model for other libraries. The package is called as a function, see `dinoreg.commands.export.export`."""

import sys

import dinoreg

sys.modules[__name__].__class__ = dinoreg.CalledPackage
