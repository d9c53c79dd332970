"""Images made harder with a trained expert or an autoencoder at hand (paper, section 4.6)."""
