"""Putting a run together: from what the user typed to a plan, a session, the loop and the product."""
