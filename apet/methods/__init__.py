"""Compression methods; importing the package registers them."""

from apet.methods import apet, random
from apet.methods.base import Method, StageContext, get_method, method_names, register, selector

__all__ = ["Method", "StageContext", "apet", "get_method", "method_names", "random", "register", "selector"]
