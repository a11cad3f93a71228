"""Weights: read, described, fitted to settings and filled into models; hubs, published files, safe pickles."""
