"""Servers under load: many streams at once, clients that leave, bodies that are no requests."""
