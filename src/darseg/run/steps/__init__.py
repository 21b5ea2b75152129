"""The steps of a round – label, train, align, evaluate – and the one way in which a step is done."""
