"""The exported folder, and the photographs and captions that the gate runs on."""
