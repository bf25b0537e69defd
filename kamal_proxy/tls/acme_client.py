"""One conversation with a certificate authority (RFC 8555), on the ``acme`` library; it blocks.

Owns the protocol: account, order, challenge, certificate. When to talk, and what to keep, is the
business of others. Whatever an authority answers, however late, an AcmeError is the worst of it.
"""

from __future__ import annotations

import contextlib
import datetime
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs
from acme import client, errors, messages
from acme.challenges import KeyAuthorizationChallenge
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from josepy.jwa import ES256, RS256
from josepy.jwk import JWKEC, JWKRSA
from josepy.util import ComparableRSAKey

from kamal_proxy.errors import AcmeError
from kamal_proxy.tls.acme_errors import (
    ValidationError,
    seconds_of,
    translated,
    validation_error,
)
from kamal_proxy.tls.acme_messages import (
    ReplacingOrder,
    address,
    certificate_request,
    read_authorization,
    read_chain,
    read_order,
    renewal_identifier,
)
from kamal_proxy.tls.challenges import KINDS, key_pem
from kamal_proxy.tls.schedule import Failure
from kamal_proxy.tls.transport import TIMEOUT, EndedError, Transport

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from contextlib import AbstractContextManager

    import requests
    from josepy.interfaces import JSONDeSerializable
    from josepy.jwk import JWK

    from kamal_proxy.tls.challenges import Answers
    from kamal_proxy.tls.store import CertificateStore

USER_AGENT = "kamal-proxy"

_VALIDATION_LIMIT = 120.0  # seconds
_ISSUE_LIMIT = 120.0
_FIRST_POLL, _LAST_POLL = 0.25, 5.0  # seconds between two questions whether it is done
_PATIENCE = 30.0  # the longest that an authority may ask to wait in between
_ASK_AGAIN = 6 * 3600.0  # seconds (RFC 9773 4.3.3)
_NONCES = 10  # how often a request is repeated whose nonce was not accepted


@attrs.frozen
class Account:
    """An account at a certificate authority; can be used by many conversations.

    Attributes:
        key_pem: Its private key.
        url: Where it is.
        directory: The authority's directory, as JSON data.
    """

    key_pem: bytes = attrs.field(repr=False)
    url: str
    directory: Mapping[str, Any] = attrs.field(repr=False)


@attrs.frozen
class Obtained:
    """A new certificate.

    Attributes:
        chain_pem: The certificate and what vouches for it.
        key_pem: Its private key.
        challenge: The kind of challenge that was needed; empty if the authority remembered.
    """

    chain_pem: bytes
    key_pem: bytes = attrs.field(repr=False)
    challenge: str


class Witness(Protocol):
    """Is told what is about to be asked of an authority, because that counts whatever follows."""

    def validating(self) -> None:
        """Learn that the authority will look at the host now."""

    def issuing(self) -> None:
        """Learn that it will issue the certificate now."""


class AcmeClient:
    """Talks to a certificate authority, in one thread; only :meth:`end` is for others.

    Args:
        directory: URL of its ACME directory.
        ca_file: Certificates (PEM) by which the authority itself is verified; empty means those
            of well-known authorities.
        known: The account to use, if it is known already.
    """

    def __init__(self, directory: str, *, ca_file: str = "", known: Account | None = None) -> None:
        self._directory_url = directory
        self._transport = Transport()
        # The library says bool; what it does with it is to hand it on to requests.
        verify: Any = ca_file or True
        self._network = client.ClientNetwork(
            verify_ssl=verify, user_agent=USER_AGENT, timeout=TIMEOUT
        )
        self._network.session.adapters.clear()  # plain HTTP is not spoken
        self._network.session.mount("https://", self._transport)
        self._key: JWK | None = None
        self._directory: messages.Directory | None = None
        if known is not None:
            self.use(known)

    def end(self) -> None:
        """End the conversation, also in the middle of it; from any thread."""
        self._transport.end()

    def close(self) -> None:
        """End the conversation, and close its connections; from its own thread."""
        self.end()
        self._network.session.close()

    @property
    def is_ended(self) -> bool:
        """Whether it was ended."""
        return self._transport.ended.is_set()

    # --- the account -----------------------------------------------------------------------------

    def open_account(
        self,
        account_key_pem: bytes,
        *,
        contact: str = "",
        eab_key_id: str = "",
        eab_hmac_key: str = "",
    ) -> Account:
        """Look up the account of a key; make it, and agree to the terms, if there is none.

        Args:
            account_key_pem: Its private key: ECDSA P-256, or RSA.
            contact: Address of electronic mail; may be empty.
            eab_key_id: Identifier of an account outside, to which this one is bound.
            eab_hmac_key: Secret of that account, in base64url.

        Raises:
            AcmeError: there is no account.
        """
        with self._answers():
            self._use_key(account_key_pem)
            directory = self._get_directory()
            binding = None
            if eab_key_id:
                assert self._key is not None
                public = self._key.public_key()
                binding = messages.ExternalAccountBinding.from_data(
                    public, eab_key_id, eab_hmac_key, directory
                )
            elif directory.meta.external_account_required:
                raise AcmeError(
                    "the certificate authority wants accounts to be bound to one outside; give "
                    "--acme-eab-kid and --acme-eab-hmac-key",
                    kind=Failure.ACCOUNT,
                )
            registration = messages.NewRegistration.from_data(
                email=contact or None,
                terms_of_service_agreed=True,
                external_account_binding=binding,
            )
            # Not the library's new_account, which makes an exception of accounts that exist.
            response = self._post(directory["newAccount"], registration)
            account = Account(
                account_key_pem,
                address(response.headers.get("Location")),
                directory.to_partial_json(),
            )
        self.use(account)
        return account

    def use(self, account: Account) -> None:
        """Use an account that another conversation has opened."""
        self._use_key(account.key_pem)
        self._directory = messages.Directory(account.directory)
        self._network.account = messages.RegistrationResource(
            body=messages.Registration(), uri=account.url
        )

    def _use_key(self, pem: bytes) -> None:
        try:
            key = serialization.load_pem_private_key(pem, password=None)
        except (ValueError, TypeError) as error:
            raise AcmeError(
                f"the key of the account can't be used: {error}", kind=Failure.ACCOUNT
            ) from error
        if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name == "secp256r1":
            self._key, self._network.alg = JWKEC(key=key), ES256
        elif isinstance(key, rsa.RSAPrivateKey):
            self._key, self._network.alg = JWKRSA(key=ComparableRSAKey(key)), RS256
        else:
            raise AcmeError(
                "the key of the account must be ECDSA P-256 or RSA", kind=Failure.ACCOUNT
            )
        self._network.key = self._key

    # --- a certificate ---------------------------------------------------------------------------

    def obtain(
        self,
        host: str,
        answers: Answers,
        store: CertificateStore,
        witness: Witness,
        *,
        kinds: Sequence[str] = KINDS,
        replaces: bytes | None = None,
    ) -> Obtained:
        """Obtain a certificate for one name, with a key that is made for it.

        Args:
            host: The name.
            answers: Where the answer to the challenge is shown.
            store: Where it is shown to other processes.
            witness: Is told what is about to be asked; what that raises ends the conversation.
            kinds: The kinds of challenges that may be tried; the first one that is offered is.
            replaces: The certificate (PEM) that will be replaced, which the authority may count in
                our favour (RFC 9773 5).

        Raises:
            ValidationError: the authority could not validate the name.
            AcmeError: something else went wrong.
            CertificateStoreError: the answer can't be shown to other processes.
        """
        with self._answers(host):
            url, order = self._order(host, replaces)
            (authorization,) = order.authorizations  # one, as there is one name
            challenge = self._authorize(
                address(authorization), host, kinds, answers, store, witness
            )
            key = ec.generate_private_key(ec.SECP256R1())
            chain = self._finalize(url, order, host, key, witness)
        return Obtained(chain, key_pem(key), challenge)

    def _order(self, host: str, replaces: bytes | None) -> tuple[str, messages.Order]:
        identifiers = [messages.Identifier(typ=messages.IDENTIFIER_FQDN, value=host)]
        directory = self._get_directory()
        response = None
        replaced = None if replaces is None else renewal_identifier(replaces)
        if replaced is not None and "renewalInfo" in directory.to_partial_json():
            order = ReplacingOrder(identifiers=identifiers, replaces=replaced)
            # An authority that does not know the old one, or has replaced it already, is asked
            # without it.
            with contextlib.suppress(messages.Error, errors.ConflictError):
                response = self._post(directory["newOrder"], order)
        if response is None:
            response = self._post(directory["newOrder"], messages.NewOrder(identifiers=identifiers))
        return address(response.headers.get("Location")), read_order(response)

    def _authorize(
        self,
        url: str,
        host: str,
        kinds: Sequence[str],
        answers: Answers,
        store: CertificateStore,
        witness: Witness,
    ) -> str:
        """Have the name validated; return the kind of the challenge, nothing if there was none."""
        authorization = read_authorization(self._post(url, None))
        if authorization.status == messages.STATUS_VALID:
            return ""
        offered = {each.chall.typ: each for each in authorization.challenges}
        kind = next((kind for kind in kinds if kind in offered), None)
        if kind is None or not isinstance(offered[kind].chall, KeyAuthorizationChallenge):
            raise AcmeError(
                f"the certificate authority offers no challenge of the kinds {', '.join(kinds)} "
                f"for {host}",
                kind=Failure.REFUSED,
            )
        challenge = offered[kind]
        assert self._key is not None
        with answers.shown(store, host, challenge.chall, self._key):
            witness.validating()
            self._post(challenge.uri, challenge.response(self._key))
            deadline = time.monotonic() + _VALIDATION_LIMIT
            for _ in self._poll(deadline):
                authorization = read_authorization(self._post(url, None))
                if authorization.status == messages.STATUS_VALID:
                    return kind
                if authorization.status != messages.STATUS_PENDING:
                    raise validation_error(authorization, kind)
        words = "the certificate authority did not get done with it"
        raise ValidationError(f"{kind}: {words}", kind, hopeless=True)

    def _finalize(
        self,
        url: str,
        order: messages.Order,
        host: str,
        key: ec.EllipticCurvePrivateKey,
        witness: Witness,
    ) -> bytes:
        finalize = address(order.finalize)
        requested = False
        deadline = time.monotonic() + _ISSUE_LIMIT
        for _ in self._poll(deadline):
            order = read_order(self._post(url, None))
            if order.status == messages.STATUS_VALID:
                answer = self._post(address(order.certificate), None)
                return read_chain(answer.content, key, host)
            if order.status == messages.STATUS_READY and not requested:
                requested = True
                witness.issuing()
                self._post(finalize, certificate_request(host, key))
            elif order.status == messages.STATUS_INVALID:
                raise order.error or AcmeError(
                    "the certificate authority has given up the order without a reason",
                    kind=Failure.REFUSED,
                )
        raise AcmeError(
            f"the certificate authority did not get done with the certificate for {host}",
            kind=Failure.REFUSED,
        )

    def renewal_time(self, certificate_pem: bytes) -> tuple[float | None, float]:
        """Ask when a certificate should be renewed (RFC 9773).

        Args:
            certificate_pem: The certificate.

        Returns:
            Unix time, None if the authority does not say; and in how many seconds to ask again.

        Raises:
            AcmeError: it could not be asked.
        """
        with self._answers():
            talk = client.ClientV2(self._get_directory(), self._network)
            if renewal_identifier(certificate_pem) is None:
                return None, _ASK_AGAIN
            try:
                at, ask_again = talk.renewal_time(certificate_pem)
            except errors.ARIError as error:
                raise error.__cause__ or error from None
            seconds = (ask_again - datetime.datetime.now()).total_seconds()
            return None if at is None else at.timestamp(), seconds

    # --- requests --------------------------------------------------------------------------------

    def _get_directory(self) -> messages.Directory:
        if self._directory is None:
            data = self._network.get(self._directory_url).json()
            self._directory = messages.Directory.from_json(data)
        return self._directory

    def _post(self, url: str, message: JSONDeSerializable | None) -> requests.Response:
        new_nonce = address(self._get_directory()["newNonce"])
        for attempt in range(_NONCES):
            try:
                return self._network.post(url, message, new_nonce_url=new_nonce)
            except messages.Error as error:
                if error.code != "badNonce" or attempt == _NONCES - 1:
                    raise
        raise AssertionError("the last attempt returns or raises")

    def _poll(self, deadline: float) -> Iterator[None]:
        """Yield again and again, waiting in between for as long as the authority wants."""
        wait = _FIRST_POLL
        while True:
            yield
            asked = self._retry_after()
            pause = wait if asked is None else min(max(asked, _FIRST_POLL), _PATIENCE)
            wait = min(wait * 2, _LAST_POLL)
            if time.monotonic() + pause > deadline:
                return
            if self._transport.ended.wait(pause):
                raise EndedError("ended")

    def _retry_after(self) -> float | None:
        return seconds_of(self._transport.retry_after)

    def _answers(self, host: str = "") -> AbstractContextManager[None]:
        return translated(self._directory_url, self._retry_after, host)
