"""The files that LMCache's users copy, as they stand."""

TUTORIAL = """\
# What LMCache users copy from a widely read tutorial for a shared Redis. LMCache 0.5.6 ignores `storage` and reads no size from "10GB".
storage:
  type: redis
  host: localhost
  port: 6379
chunk_size: 256
max_local_cpu_size: "10GB"
"""  # noqa: E501
MOONCAKE_PREFILLER = """\
# The same tutorial's file for prefiller and decoder on two machines (the address is a placeholder there, too).
chunk_size: 256
remote_url: "mooncakestore://127.0.0.1:50052/"
protocol: "rdma"
device_name: "mlx5_0"
metadata_server: "http://127.0.0.1:8080/metadata"
"""
NATIVE = """\
# The same two in the spelling that LMCache 0.5.6 itself reads.
chunk_size: 256
local_cpu: true
max_local_cpu_size: 10
remote_url: "mooncakestore://127.0.0.1:50051/"
remote_serde: "naive"
extra_config:
  local_hostname: "127.0.0.1"
  metadata_server: "http://127.0.0.1:8080/metadata"
  protocol: "tcp"
  device_name: ""
  master_server_address: "127.0.0.1:50051"
  global_segment_size: 3355443200
  local_buffer_size: 1073741824
  transfer_timeout: 1
"""
