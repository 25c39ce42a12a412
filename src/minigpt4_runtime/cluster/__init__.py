"""ONE question about any number of images, on the machines of a Ray cluster.

Owns   the list of images, the folder of shards in which a run can be continued, and the workers.
Takes  paths, addresses of object stores and tables as typed; gives the records of `describe`.
Never  depends on a worker or a machine: any may be lost at any time, and is replaced.
"""
