"""The command `compress`: a trained model made smaller, or with other mixers, as a run that goes on."""
