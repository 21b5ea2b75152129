"""The steps of a round – label, train, evaluate – and the one way in which a step is done."""
