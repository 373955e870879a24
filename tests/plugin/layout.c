/* Checks the layout of the header's structs on 64-bit systems. The Rust side tests the same numbers. Changing any of them
 * changes the ABI. */
#include "detox_gguf.h"

#define SAME(type, member, at) _Static_assert(offsetof(type, member) == (at), #type "." #member)
#define SIZE(type, n) _Static_assert(sizeof(type) == (n), "sizeof " #type)

SIZE(detox_status, 4);
SIZE(detox_route, 4);

SIZE(detox_steer_options, 24);
SAME(detox_steer_options, coefficient, 8);
SAME(detox_steer_options, route, 12);
SAME(detox_steer_options, force, 16);

SIZE(detox_control_vector, 32);
SAME(detox_control_vector, len, 8);
SAME(detox_control_vector, n_embd, 16);
SAME(detox_control_vector, il_start, 20);
SAME(detox_control_vector, il_end, 24);
SAME(detox_control_vector, is_whole, 28);

SIZE(detox_shape, 72);
SAME(detox_shape, type, 0);
SAME(detox_shape, ne, 8);
SAME(detox_shape, nb, 40);

SIZE(detox_host_table, 56);
SAME(detox_host_table, name, 8);
SAME(detox_host_table, shape, 16);
SAME(detox_host_table, get, 24);
SAME(detox_host_table, set, 32);
SAME(detox_host_table, op, 40);
SAME(detox_host_table, source, 48);

SIZE(detox_callback_options, 32);
SAME(detox_callback_options, n_seq_max, 8);
SAME(detox_callback_options, kv_unified, 12);
SAME(detox_callback_options, next, 16);
SAME(detox_callback_options, next_user_data, 24);

SIZE(detox_gate_options, 24);
SAME(detox_gate_options, threshold, 8);
SAME(detox_gate_options, window, 16);
SAME(detox_gate_options, force, 20);

_Static_assert(DETOX_ABI_VERSION == 1, "DETOX_ABI_VERSION");
_Static_assert(DETOX_OK == 0 && DETOX_INVALID_ARGUMENT == 1 && DETOX_INVALID_HANDLE == 2 && DETOX_IO_ERROR == 3
                   && DETOX_INVALID_FILE == 4 && DETOX_UNSUPPORTED == 5 && DETOX_REFUSED == 6
                   && DETOX_NOT_STEERED == 7 && DETOX_INTERNAL_ERROR == 8,
               "detox_status");
_Static_assert(DETOX_ROUTE_CHEAPEST == 0 && DETOX_ROUTE_CALLBACK == 1, "detox_route");
