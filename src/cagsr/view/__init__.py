"""Attention viewer: what the answers to a prompt looked at and what each term gave them, as a page or a picture."""

from cagsr.view.notebook import View, view

__all__ = ["View", "view"]
