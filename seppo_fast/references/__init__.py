"""Past policies, kept where there is room; usable without the rest of the package.

`ReferencePool` is the public name.
"""

from seppo_fast.references.pool import ReferencePool as ReferencePool
