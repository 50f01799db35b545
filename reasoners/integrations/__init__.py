"""Bridges to other packages, each optional and imported only when asked for."""
