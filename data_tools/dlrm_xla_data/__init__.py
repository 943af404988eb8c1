"""Raw click logs -> prepared dataset -> batches; and synthetic rows with a planted signal."""
