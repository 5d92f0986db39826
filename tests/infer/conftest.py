"""One thread: the fastest for models this small, and tests on other cores are not slowed down."""

from tests.threads import one_thread as one_thread
