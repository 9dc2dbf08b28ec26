"""Reading any adapter into its meaning and writing it in any spelling: containers, dialects and planner put together.
No deep-learning framework is imported here."""
