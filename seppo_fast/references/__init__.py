"""The pool of past policies; it can be used without the rest of the package.

`ReferencePool` is its public name.
"""

from seppo_fast.references.pool import ReferencePool as ReferencePool
