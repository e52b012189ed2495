"""How a program is graded: what is sent to a lane, what comes back, and the verdict; one file for each way.

A :class:`~coderl.sandbox.program.Program` comes in, a job for one or two lanes goes out; their answers come
in, an :class:`~coderl.types.Execution` goes out. Lanes and processes are the pool's business.
"""
