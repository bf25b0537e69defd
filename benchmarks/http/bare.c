/* bare: the least that a relay of TCP connections can do, to measure what the sockets alone cost.
 *
 * One epoll, one listener, one connection to the target for each client. What has arrived is
 * received once and sent once. There are no time-outs, limits, counters or frames, and nothing is
 * kept for a side that takes too little: such a connection is closed.
 *
 *     bare LISTEN_PORT TARGET_PORT        both on 127.0.0.1
 */
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <netinet/tcp.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

#define EVENTS 64
#define DESCRIPTORS 65536

static int peers[DESCRIPTORS]; /* 0: closed */
static char buffer[65536];
static int epoll;

static void fail(const char *what)
{
	perror(what);
	exit(1);
}

static struct sockaddr_in local(const char *port)
{
	struct sockaddr_in address = {.sin_family = AF_INET, .sin_port = htons(atoi(port))};
	address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
	return address;
}

static void watch(int descriptor, uint32_t edges)
{
	struct epoll_event event = {.events = edges, .data.fd = descriptor};
	if (epoll_ctl(epoll, EPOLL_CTL_ADD, descriptor, &event))
		fail("epoll_ctl");
}

static void begin(int listener, const struct sockaddr_in *target)
{
	int yes = 1;
	int client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
	if (client < 0)
		return;
	int upstream = socket(AF_INET, SOCK_STREAM, 0);
	if (upstream < 0 || upstream >= DESCRIPTORS || client >= DESCRIPTORS ||
	    connect(upstream, (const struct sockaddr *)target, sizeof(*target)))
		fail("connect");
	peers[client] = upstream;
	peers[upstream] = client;
	for (int i = 0; i < 2; i++) {
		int descriptor = i ? upstream : client;
		setsockopt(descriptor, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof(yes));
		watch(descriptor, EPOLLIN | EPOLLRDHUP | EPOLLET);
	}
}

static void pass_on(int descriptor)
{
	int peer = peers[descriptor];
	if (!peer)
		return;
	ssize_t size = recv(descriptor, buffer, sizeof(buffer), MSG_DONTWAIT);
	if (size < 0 && errno == EAGAIN)
		return;
	if (size <= 0 || send(peer, buffer, size, MSG_DONTWAIT | MSG_NOSIGNAL) != size) {
		peers[descriptor] = peers[peer] = 0;
		close(descriptor);
		close(peer);
	}
}

int main(int argc, char **argv)
{
	int yes = 1;
	struct epoll_event events[EVENTS];
	if (argc != 3) {
		fprintf(stderr, "usage: bare LISTEN_PORT TARGET_PORT\n");
		return 2;
	}
	struct sockaddr_in address = local(argv[1]), target = local(argv[2]);
	int listener = socket(AF_INET, SOCK_STREAM, 0);
	if (listener < 0 || setsockopt(listener, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof(yes)) ||
	    bind(listener, (struct sockaddr *)&address, sizeof(address)) || listen(listener, 4096))
		fail("listen");
	epoll = epoll_create1(0);
	if (epoll < 0)
		fail("epoll_create1");
	watch(listener, EPOLLIN);
	for (;;) {
		int count = epoll_wait(epoll, events, EVENTS, -1);
		if (count < 0 && errno != EINTR)
			fail("epoll_wait");
		for (int i = 0; i < count; i++) {
			if (events[i].data.fd == listener)
				begin(listener, &target);
			else
				pass_on(events[i].data.fd);
		}
	}
}
