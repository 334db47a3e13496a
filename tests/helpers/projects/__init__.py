"""Styles in which people write diffusion projects, each in a small module of its own.

A module has ``Project``, as somebody might write it, and either ``ByHand``, the same with AGC written into its training
step, or ``REASON``, what AGC says when it refuses it. ``AGC`` holds further arguments of the callback.
"""
