/* batches: what both loads share: sockets, and datagrams in batches. ROOM is that for a datagram. */
#include <arpa/inet.h>
#include <errno.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <time.h>

#define BATCH 64
#define SOCKET_BUFFER (4 << 20)
#define MILLISECOND 1000000ull

/* Room for a batch of datagrams, their peers' addresses and the local ones. */
struct batch {
	struct mmsghdr messages[BATCH];
	struct iovec parts[BATCH];
	struct sockaddr_in peers[BATCH];
	union {
		struct cmsghdr head;
		char room[CMSG_SPACE(sizeof(struct in_pktinfo))];
	} local[BATCH];
	char bytes[BATCH][ROOM];
};

static void die(const char *what)
{
	perror(what);
	exit(1);
}

static uint64_t now(void)
{
	struct timespec time;

	clock_gettime(CLOCK_MONOTONIC, &time);
	return time.tv_sec * 1000 * MILLISECOND + time.tv_nsec;
}

static int open_socket(uint32_t address, int port)
{
	struct sockaddr_in local = {.sin_family = AF_INET, .sin_port = htons(port)};
	int size = SOCKET_BUFFER, on = 1, fd = socket(AF_INET, SOCK_DGRAM | SOCK_CLOEXEC, 0);

	local.sin_addr.s_addr = htonl(address);
	if (fd < 0 || bind(fd, (struct sockaddr *)&local, sizeof(local)) < 0)
		die("UDP port");
	/* The forced size may go beyond the limit, but needs a privilege. */
	if (setsockopt(fd, SOL_SOCKET, SO_RCVBUFFORCE, &size, sizeof(size)) < 0 &&
	    setsockopt(fd, SOL_SOCKET, SO_RCVBUF, &size, sizeof(size)) < 0)
		die("SO_RCVBUF");
	if (setsockopt(fd, IPPROTO_IP, IP_PKTINFO, &on, sizeof(on)) < 0)
		die("IP_PKTINFO");
	return fd;
}

static void prepare(struct batch *batch)
{
	int at;

	for (at = 0; at < BATCH; at++) {
		batch->parts[at] = (struct iovec){batch->bytes[at], ROOM};
		batch->messages[at].msg_hdr = (struct msghdr){
			.msg_name = &batch->peers[at],
			.msg_namelen = sizeof(batch->peers[at]),
			.msg_iov = &batch->parts[at],
			.msg_iovlen = 1,
			.msg_control = &batch->local[at],
			.msg_controllen = sizeof(batch->local[at]),
		};
	}
}

static int receive(int fd, struct batch *batch)
{
	int at, got;

	for (at = 0; at < BATCH; at++) {
		batch->parts[at].iov_len = ROOM;
		batch->messages[at].msg_hdr.msg_controllen = sizeof(batch->local[at]);
	}
	got = recvmmsg(fd, batch->messages, BATCH, MSG_DONTWAIT, NULL);
	if (got < 0 && errno != EAGAIN && errno != EINTR)
		die("recvmmsg");
	return got < 0 ? 0 : got;
}

static void send_batch(int fd, struct batch *batch, int count)
{
	int at, sent;

	for (at = 0; at < count; at += sent) {
		sent = sendmmsg(fd, batch->messages + at, count - at, 0);
		if (sent < 0 && errno != EINTR)
			die("sendmmsg");
		if (sent < 0)
			sent = 0;
	}
}
