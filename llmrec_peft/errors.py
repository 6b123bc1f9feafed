"""The errors that users of this package may catch.

LLMRecError (a ValueError)
├── ConfigError      a configuration key, value or combination that cannot run
├── DataError        a log, an item table or a split that breaks a rule
├── DomainError      a domain file that cannot be used
├── StreamError      an event or a window that cannot become a stream
├── ModelError       a base model or method that cannot do what is asked
└── BundleError      an adapter bundle that is damaged or does not match

Each message is one line that names the thing, the rule, the value received and the next step.
"""


class LLMRecError(ValueError):
    """Base of all errors that this package raises on purpose.

    `said_elsewhere` is set where several processes fail by one error and another of them says so.
    """

    said_elsewhere = False


class ConfigError(LLMRecError):
    """A configuration key, value or combination that cannot run."""


class DataError(LLMRecError):
    """A log, an item table or a split that breaks a rule."""


class DomainError(LLMRecError):
    """A domain file that cannot be used."""


class StreamError(LLMRecError):
    """An event or a window that cannot become a stream."""


class ModelError(LLMRecError):
    """A base model or a tuning method that cannot do what is asked."""


class BundleError(LLMRecError):
    """An adapter bundle that is damaged or does not match what it is loaded on."""
