"""Attention viewer: what the answers to a prompt looked at and what each term gave them, as a page or a picture."""

from cagsr.view.viewer import View, view

__all__ = ["View", "view"]
