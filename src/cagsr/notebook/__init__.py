"""Train in a notebook and look on: ``run = cagsr.notebook.train(config)`` draws itself while it goes on, and ``run`` shows itself.

A :class:`RunView` shows any run's folder, also of a training in another process.
"""

from cagsr.notebook.run_view import RunView, train

__all__ = ["RunView", "train"]
