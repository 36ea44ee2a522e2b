"""Trains a config with several norms under equal rules, and reports what came of it."""
