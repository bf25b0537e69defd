/* media: both ends of calls through a UDP relay that is measured, in one process: clients that send
 * RTP, and a media server that sends it back, on as many ports as a relay of calls has.
 *
 * As in load.c each call is a source address of its own out of 127.0.0.0/8, all through one socket.
 * But they are spread over the ports of the relay and send RTP with 160 bytes of payload, as of a
 * G.711 call, and each has one packet on its way at most.
 *
 *     media FIRST_PORT PORTS CLIENT_PORT SPIN
 *
 * FIRST_PORT, PORTS  the server's ports, on 127.0.0.2: those of all relays, as these relay 1:1
 * SPIN               1: never sleep during a run. The relay then pays for no wake-ups of this process
 *
 * Prints "ready", then reads one run a line from standard input and answers it with a line of JSON:
 *
 *     FIRST_PORT PORTS CALLS WINDOW PACKETS
 *
 * FIRST_PORT, PORTS  the relay's, on 127.0.0.1; calls are spread evenly over them
 * WINDOW             packets on their way at once, taken from all calls in turn
 * PACKETS            how many to send
 */
#define _GNU_SOURCE
#include <poll.h>
#include <stdbool.h>
#include <sys/epoll.h>

#define ROOM 2048 /* for a datagram; what is sent has 172 bytes */
#include "batches.h"

#define EVENTS 256
#define CALLS 65536
#define SERVER_ADDRESS 0x7f000002u /* 127.0.0.2 */
#define CALL_ADDRESSES 0x7f100000u /* 127.16.0.0 */
#define LOST_AFTER (1000 * MILLISECOND)
#define STALLED_AFTER (5000 * MILLISECOND)
/* RFC 3550 5.1: version 2, no padding, extension or CSRC. RFC 3551: payload type 0 is PCMU. */
#define FIRST_BYTE 0x80
#define PAYLOAD_TYPE 0
#define SAMPLES 160

/* A packet; its payload says which it is, at its beginning and at its end. */
struct packet {
	uint8_t first, type;
	uint16_t sequence;
	uint32_t timestamp, ssrc;
	union {
		struct {
			uint32_t magic[2], number[2], call;
		};
		struct {
			uint8_t before[SAMPLES - sizeof(uint64_t)];
			uint32_t last[2]; /* the number once more */
		};
	};
};
_Static_assert(sizeof(struct packet) == 12 + SAMPLES, "an RTP header and its payload");

struct call {
	uint64_t number; /* of the packet that is on its way */
	uint16_t sequence;
	bool open; /* whether one is */
};

struct run {
	int port, ports, calls, window, packets;
};

struct counts {
	uint64_t sent, answered, lost, late, wrong;
	bool stalled;
};

static const uint64_t magic = 0x6b616d616c727470;
static int poller, client_socket;
static bool spin;
static struct batch echoed, outgoing, incoming;
static struct call calls[CALLS];
static uint64_t next_number;  /* goes on from run to run */
static uint32_t ready[CALLS]; /* a ring of the calls whose turn comes */
static uint32_t ready_first, ready_count;
static int in_flight;
static struct run run;
static struct counts counts;

static void open_server(int first, int ports)
{
	struct epoll_event event = {.events = EPOLLIN};
	int at;

	poller = epoll_create1(EPOLL_CLOEXEC);
	if (poller < 0)
		die("epoll_create1");
	for (at = 0; at < ports; at++) {
		event.data.fd = open_socket(SERVER_ADDRESS, first + at);
		if (epoll_ctl(poller, EPOLL_CTL_ADD, event.data.fd, &event) < 0)
			die("epoll_ctl");
	}
}

/* Send back what came; the kernel's note of the local address becomes the one to answer from. */
static int serve(void)
{
	struct epoll_event events[EVENTS];
	int count = epoll_wait(poller, events, EVENTS, 0), event, at, got, moved = 0;

	for (event = 0; event < count; event++) {
		got = receive(events[event].data.fd, &echoed);
		for (at = 0; at < got; at++)
			echoed.parts[at].iov_len = echoed.messages[at].msg_len;
		if (got)
			send_batch(events[event].data.fd, &echoed, got);
		moved += got;
	}
	return moved;
}

/* Calls take the ports in turn; fewer calls than ports lie as far apart as they can. */
static int port_of(uint32_t call)
{
	uint64_t apart = run.calls < run.ports ? run.ports / run.calls : 1;

	return run.port + call * apart % run.ports;
}

static void fill(int at, uint32_t number_of_call, uint64_t number)
{
	struct call *call = &calls[number_of_call];
	struct in_pktinfo from = {.ipi_spec_dst.s_addr = htonl(CALL_ADDRESSES + number_of_call)};
	struct cmsghdr *local = &outgoing.local[at].head;
	struct packet *packet = (struct packet *)outgoing.bytes[at];

	call->sequence++;
	packet->first = FIRST_BYTE;
	packet->type = PAYLOAD_TYPE;
	packet->sequence = htons(call->sequence);
	packet->timestamp = htonl(call->sequence * SAMPLES);
	packet->ssrc = htonl(number_of_call + 1);
	packet->call = number_of_call;
	memcpy(packet->magic, &magic, sizeof(magic));
	memcpy(packet->number, &number, sizeof(number));
	memcpy(packet->last, &number, sizeof(number));
	outgoing.parts[at].iov_len = sizeof(*packet);
	outgoing.peers[at] = (struct sockaddr_in){
		.sin_family = AF_INET,
		.sin_port = htons(port_of(number_of_call)),
		.sin_addr.s_addr = htonl(INADDR_LOOPBACK),
	};
	local->cmsg_level = IPPROTO_IP;
	local->cmsg_type = IP_PKTINFO;
	local->cmsg_len = CMSG_LEN(sizeof(from));
	memcpy(CMSG_DATA(local), &from, sizeof(from));
}

static void make_ready(uint32_t call)
{
	ready[(ready_first + ready_count++) % CALLS] = call;
}

static int send_packets(void)
{
	uint32_t call;
	int count = 0;

	while (count < BATCH && ready_count && in_flight < run.window &&
	       counts.sent < (uint64_t)run.packets) {
		call = ready[ready_first];
		ready_first = (ready_first + 1) % CALLS;
		ready_count--;
		calls[call].number = next_number;
		calls[call].open = true;
		fill(count++, call, next_number++);
		in_flight++;
		counts.sent++;
	}
	if (count)
		send_batch(client_socket, &outgoing, count);
	return count;
}

static void close_packet(uint32_t call)
{
	calls[call].open = false;
	in_flight--;
	make_ready(call);
}

static void take_answer(const struct mmsghdr *message)
{
	const struct msghdr *head = &message->msg_hdr;
	const struct packet *packet = head->msg_iov->iov_base;
	const struct sockaddr_in *peer = head->msg_name;
	const struct cmsghdr *local = CMSG_FIRSTHDR(head);
	uint64_t number;

	if (message->msg_len != sizeof(*packet) || !local ||
	    memcmp(packet->magic, &magic, sizeof(magic)) ||
	    memcmp(packet->number, packet->last, sizeof(number)) ||
	    packet->first != FIRST_BYTE || packet->type != PAYLOAD_TYPE) {
		counts.wrong++;
		return;
	}
	memcpy(&number, packet->number, sizeof(number));
	if (packet->call >= (uint32_t)run.calls ||
	    ((const struct in_pktinfo *)CMSG_DATA(local))->ipi_addr.s_addr !=
		    htonl(CALL_ADDRESSES + packet->call) ||
	    peer->sin_addr.s_addr != htonl(INADDR_LOOPBACK) ||
	    ntohs(peer->sin_port) != port_of(packet->call)) {
		counts.wrong++;
		return;
	}
	if (!calls[packet->call].open || calls[packet->call].number != number) {
		counts.late++; /* or twice */
		return;
	}
	counts.answered++;
	close_packet(packet->call);
}

static int take_answers(void)
{
	int at, got = receive(client_socket, &incoming);

	for (at = 0; at < got; at++)
		take_answer(&incoming.messages[at]);
	return got;
}

static void give_up_all(void)
{
	int call;

	for (call = 0; call < run.calls; call++)
		if (calls[call].open) {
			counts.lost++;
			close_packet(call);
		}
}

static void rest(void)
{
	struct pollfd sockets[] = {{poller, POLLIN, 0}, {client_socket, POLLIN, 0}};

	if (!spin && poll(sockets, 2, 10) < 0 && errno != EINTR)
		die("poll");
}

static void measure(void)
{
	uint64_t time = now(), last_move = time, last_answer = time, answered = 0;
	int at, moved;

	memset(&counts, 0, sizeof(counts));
	ready_first = ready_count = 0;
	for (at = 0; at < run.calls; at++)
		make_ready(at);
	while (in_flight || (!counts.stalled && counts.sent < (uint64_t)run.packets)) {
		moved = counts.stalled ? 0 : send_packets();
		moved += serve();
		moved += take_answers();
		time = now();
		if (moved)
			last_move = time;
		/* What is missing once nothing moves any more does not come: all take turns. */
		else if (time - last_move > LOST_AFTER)
			give_up_all();
		else
			rest();
		if (answered != counts.answered) {
			answered = counts.answered;
			last_answer = time;
		}
		counts.stalled = time - last_answer > STALLED_AFTER;
	}
	printf("{\"sent\": %lu, \"answered\": %lu, \"lost\": %lu, \"late\": %lu, \"wrong\": %lu, "
	       "\"stalled\": %s}\n",
	       counts.sent, counts.answered, counts.lost, counts.late, counts.wrong,
	       counts.stalled ? "true" : "false");
}

int main(int argc, char **argv)
{
	char line[256];

	if (argc != 5)
		return 2;
	spin = atoi(argv[4]);
	open_server(atoi(argv[1]), atoi(argv[2]));
	/* Every address of 127.0.0.0/8 is the clients'; the server has one. */
	client_socket = open_socket(INADDR_ANY, atoi(argv[3]));
	prepare(&echoed);
	prepare(&outgoing);
	prepare(&incoming);
	puts("ready");
	fflush(stdout);
	while (fgets(line, sizeof(line), stdin)) {
		if (sscanf(line, "%d %d %d %d %d", &run.port, &run.ports, &run.calls, &run.window,
			   &run.packets) != 5 ||
		    run.ports < 1 || run.calls < 1 || run.calls > CALLS || run.window < 1 ||
		    run.packets < 1) {
			fprintf(stderr, "not a run: %s", line);
			return 2;
		}
		measure();
		fflush(stdout);
	}
	return 0;
}
