/* bare: the least that a UDP relay can do, to measure what the sockets alone cost.
 *
 * One epoll, one listener, one connected upstream socket for each client. What has arrived is
 * received in batches; it is sent in batches where several go the same way. There are no time-outs,
 * limits, counters or control messages, and no segmentation offload.
 *
 *     bare LISTEN_PORT TARGET_PORT        both on 127.0.0.1
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/resource.h>
#include <sys/socket.h>
#include <unistd.h>

#define BATCH 64
#define EVENTS 256
#define DATAGRAM 65536
/* Buffers that lie a power of two apart would all compete for the same lines of the cache. */
#define STRIDE (DATAGRAM + 192)
#define BUCKET_BITS 16
#define RECEIVE_BUFFER (4 << 20)

struct session {
	struct sockaddr_in client;
	int upstream;
	struct session *next; /* in its bucket */
	/* Its requests in the batch that is being relayed, linked by following[]. */
	int requests, first, last;
};

static struct sockaddr_in target;
static int poller, listener;
static struct session *buckets[1 << BUCKET_BITS];

/* One batch of requests: received with the clients' addresses, sent on connected sockets. */
static char request_bytes[BATCH][STRIDE];
static struct iovec request_room[BATCH], request_parts[BATCH];
static struct sockaddr_in request_clients[BATCH];
static struct mmsghdr requests[BATCH], requests_out[BATCH];
static int following[BATCH];

/* Answers that wait for their batch to fill: received on connected sockets, sent to addresses. */
static char reply_bytes[BATCH][STRIDE];
static struct iovec reply_room[BATCH], reply_parts[BATCH];
static struct mmsghdr replies[BATCH], replies_out[BATCH];
static int waiting;

static void die(const char *what)
{
	perror(what);
	exit(1);
}

/* Errors that a datagram or a peer causes: the datagram is lost, the relay goes on. */
static void check(int result, const char *what)
{
	if (result < 0 && errno != EAGAIN && errno != ECONNREFUSED && errno != EINTR &&
	    errno != ENOBUFS)
		die(what);
}

static struct sockaddr_in loopback(int port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(port)};

	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	return address;
}

static void watch(int fd, struct session *session, uint32_t events)
{
	struct epoll_event event = {.events = events, .data.ptr = session};

	if (epoll_ctl(poller, EPOLL_CTL_ADD, fd, &event) < 0)
		die("epoll_ctl");
}

static struct session *open_session(const struct sockaddr_in *client)
{
	struct session *session = calloc(1, sizeof(*session));

	if (!session)
		die("calloc");
	session->client = *client;
	session->upstream = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (session->upstream < 0)
		die("socket");
	if (connect(session->upstream, (struct sockaddr *)&target, sizeof(target)) < 0)
		die("connect");
	watch(session->upstream, session, EPOLLIN);
	return session;
}

static struct session *session_of(const struct sockaddr_in *client)
{
	uint64_t hash = (uint64_t)client->sin_addr.s_addr << 16 | client->sin_port;
	struct session **place;

	hash *= 0x9e3779b97f4a7c15; /* Fibonacci hashing: the upper bits are well mixed */
	place = &buckets[hash >> (64 - BUCKET_BITS)];
	for (; *place; place = &(*place)->next)
		if ((*place)->client.sin_addr.s_addr == client->sin_addr.s_addr &&
		    (*place)->client.sin_port == client->sin_port)
			return *place;
	return *place = open_session(client);
}

static void send_requests(struct session *session)
{
	int count = 0, sent, at = session->first;

	if (session->requests == 1) {
		check(send(session->upstream, request_bytes[at], requests[at].msg_len, 0), "send");
	} else {
		for (; count < session->requests; at = following[at], count++) {
			request_parts[count].iov_base = request_bytes[at];
			request_parts[count].iov_len = requests[at].msg_len;
		}
		for (at = 0; at < count; at += sent) {
			sent = sendmmsg(session->upstream, requests_out + at, count - at, 0);
			check(sent, "sendmmsg to the target");
			if (sent <= 0)
				sent = 1; /* the first one failed */
		}
	}
	session->requests = 0;
}

static void relay_requests(void)
{
	struct session *touched[BATCH], *session;
	int got, at, sessions = 0;

	got = recvmmsg(listener, requests, BATCH, 0, NULL);
	check(got, "recvmmsg from clients");
	for (at = 0; at < got; at++) {
		session = session_of(&request_clients[at]);
		if (session->requests++) {
			following[session->last] = at;
		} else {
			session->first = at;
			touched[sessions++] = session;
		}
		session->last = at;
	}
	for (at = 0; at < sessions; at++)
		send_requests(touched[at]);
}

static void send_replies(void)
{
	int at, sent;

	for (at = 0; at < waiting; at += sent) {
		sent = sendmmsg(listener, replies_out + at, waiting - at, 0);
		check(sent, "sendmmsg to clients");
		if (sent <= 0)
			sent = 1;
	}
	waiting = 0;
}

static void relay_replies(struct session *session)
{
	int got, end;

	if (waiting == BATCH)
		send_replies();
	/* What does not fit into the batch keeps the socket readable for the next round. A plain
	 * recv costs less where one datagram waits and more where several do; this takes both. */
	got = recvmmsg(session->upstream, replies + waiting, BATCH - waiting, 0, NULL);
	check(got, "recvmmsg from the target");
	for (end = waiting + got; waiting < end; waiting++) {
		replies_out[waiting].msg_hdr.msg_name = &session->client;
		reply_parts[waiting].iov_len = replies[waiting].msg_len;
	}
}

static void prepare_batches(void)
{
	int at;

	for (at = 0; at < BATCH; at++) {
		request_room[at] = (struct iovec){request_bytes[at], DATAGRAM};
		requests[at].msg_hdr = (struct msghdr){
			.msg_iov = &request_room[at],
			.msg_iovlen = 1,
			.msg_name = &request_clients[at],
			.msg_namelen = sizeof(request_clients[at]),
		};
		requests_out[at].msg_hdr =
			(struct msghdr){.msg_iov = &request_parts[at], .msg_iovlen = 1};
		reply_room[at] = (struct iovec){reply_bytes[at], DATAGRAM};
		reply_parts[at].iov_base = reply_bytes[at];
		replies[at].msg_hdr = (struct msghdr){.msg_iov = &reply_room[at], .msg_iovlen = 1};
		replies_out[at].msg_hdr = (struct msghdr){
			.msg_iov = &reply_parts[at],
			.msg_iovlen = 1,
			.msg_namelen = sizeof(struct sockaddr_in),
		};
	}
}

static void allow_many_sockets(void)
{
	struct rlimit limit;

	if (getrlimit(RLIMIT_NOFILE, &limit) < 0)
		die("getrlimit");
	limit.rlim_cur = limit.rlim_max;
	if (setrlimit(RLIMIT_NOFILE, &limit) < 0)
		die("setrlimit");
}

/* Tell the benchmark that the relay runs: a TCP port that takes connections, and never answers. */
static void announce(const struct sockaddr_in *address)
{
	int ready = socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);

	if (ready < 0 || bind(ready, (struct sockaddr *)address, sizeof(*address)) < 0 ||
	    listen(ready, 8) < 0)
		die("TCP port");
}

int main(int argc, char **argv)
{
	struct epoll_event events[EVENTS];
	struct sockaddr_in address;
	int size = RECEIVE_BUFFER, count, at;

	if (argc != 3) {
		fprintf(stderr, "usage: bare LISTEN_PORT TARGET_PORT\n");
		return 2;
	}
	address = loopback(atoi(argv[1]));
	target = loopback(atoi(argv[2]));
	allow_many_sockets();
	prepare_batches();
	poller = epoll_create1(EPOLL_CLOEXEC);
	listener = socket(AF_INET, SOCK_DGRAM | SOCK_NONBLOCK | SOCK_CLOEXEC, 0);
	if (poller < 0 || listener < 0)
		die("socket");
	if (setsockopt(listener, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)) < 0)
		die("SO_RCVBUF");
	if (bind(listener, (struct sockaddr *)&address, sizeof(address)) < 0)
		die("bind");
	watch(listener, NULL, EPOLLIN);
	announce(&address);
	for (;;) {
		count = epoll_wait(poller, events, EVENTS, -1);
		check(count, "epoll_wait");
		for (at = 0; at < count; at++) {
			if (events[at].data.ptr)
				relay_replies(events[at].data.ptr);
			else
				relay_requests();
		}
		send_replies();
	}
}
