"""Predictions of a segmentor on files: what `tools/predict.py` is made of."""
