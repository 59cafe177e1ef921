"""Images on disk: what is there, what class it has, and its pixels.

listing   a folder or a list of paths -> `ImageList`
labels    classes from a file
decode    one file -> uint8 RGB, with a status for each failure
jpeg      what the headers of a JPEG say
crew      threads that decode, and give up what takes too long
"""
