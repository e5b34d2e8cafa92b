"""Carrying out a plan: blocks, threads, devices, clusters."""
