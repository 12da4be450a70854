"""SciTLDR: abstracts to one sentence, on a pretrained model, where no checker knows the truth."""
