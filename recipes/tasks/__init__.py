"""What the programs train on what: models, data, losses and scores."""
