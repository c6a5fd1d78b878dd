"""Translation by encoder-decoders: BLEU, chrF2++ and TER of decoded text."""
