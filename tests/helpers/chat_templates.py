"""Chat templates in the style of published ones, written for the tests: what they write, and the
means by which they write it, are the same. A comment marks the part of an answer that a model has
to write."""

CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' }}"
    "{%- if m['role'] == 'assistant' %}{%- generation %}"
    "{{- (m['content'] or '') + '<|im_end|>' }}{%- endgeneration %}"
    "{%- else %}{{- (m['content'] or '') + '<|im_end|>' }}{%- endif %}{{- '\\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set rest = messages[1:] %}"
    "{% set intro = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' %}"
    "{% else %}{% set rest = messages %}{% set intro = '' %}{% endif %}"
    "{% for m in rest %}{% set words = (intro if loop.first else '') ~ (m.content or '') %}"
    "{% if m.role == 'assistant' %}{#- answer -#}{{ ' ' ~ words | trim ~ ' ' ~ eos_token }}"
    "{#- end -#}"
    "{% else %}{{ bos_token ~ '[INST] ' ~ words | trim ~ ' [/INST]' }}{% endif %}{% endfor %}"
)
LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system = '' %}
{%- endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}
{%- if tools is not none %}{{- 'Environment: ipython\\n' }}{%- endif %}
{{- 'Today Date: ' + date_string + '\\n\\n' }}
{{- system + '<|eot_id|>' }}
{%- if tools is not none %}
    {%- for tool in tools %}{{- tool | tojson(indent=4) + '\\n\\n' }}{%- endfor %}
{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- if m.tool_calls | length != 1 %}
            {{- raise_exception('one call at a time') }}
        {%- endif %}
        {%- set call = m.tool_calls[0].function %}
        {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
        {#- answer -#}{{- '{"name": "' + call.name + '", "parameters": ' }}
        {{- call.arguments | tojson }}{{- '}<|eot_id|>' }}{#- end -#}
    {%- else %}
        {%- set role = 'ipython' if m.role == 'tool' else m.role %}
        {{- '<|start_header_id|>' + role + '<|end_header_id|>\\n\\n' }}
        {%- set words = (m.content or '') | trim + '<|eot_id|>' %}
        {%- if m.role == 'assistant' %}{#- answer -#}{{- words }}{#- end -#}
        {%- else %}{{- words }}{%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}"""
MISTRAL = """{%- if messages[0].role == 'system' %}
    {%- set intro = messages[0].content %}{%- set rest = messages[1:] %}
{%- else %}{%- set intro = '' %}{%- set rest = messages %}{%- endif %}
{%- set asked = rest | selectattr('role', 'equalto', 'user') | list %}
{{- bos_token }}
{%- for m in rest %}
    {%- if m.role == 'user' %}
        {%- if tools is not none and m == asked[-1] %}
            {{- '[AVAILABLE_TOOLS]' }}{{ tools | tojson }}{{- '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + (intro + '\\n\\n' if loop.last and intro else '') + m.content + '[/INST]' }}
    {%- elif m.tool_calls is defined and m.tool_calls is not none %}
        {{- '[TOOL_CALLS][' }}
        {%- for call in m.tool_calls %}
            {{- call.function | tojson }}{{- ', ' if not loop.last else ']' + eos_token }}
        {%- endfor %}
    {%- elif m.role == 'assistant' %}{{- ' ' + m.content + eos_token }}
    {%- elif m.role == 'tool' %}{{- '[RESULT]' + m.content | string + '[/RESULT]' }}
    {%- else %}{{- raise_exception('no role of this name') }}{%- endif %}
{%- endfor %}"""
QWEN3 = """{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- '<tools>' }}{%- for tool in tools %}{{- '\\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '\\n</tools><|im_end|>\\n' }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(searching=true, asked=messages | length - 1) %}
{%- for m in messages[::-1] %}
    {%- set i = (messages | length - 1) - loop.index0 %}
    {%- if ns.searching and m.role == 'user' %}
        {%- set ns.searching = false %}{%- set ns.asked = i %}
    {%- endif %}
{%- endfor %}
{%- for m in messages %}
    {%- set content = m.content if m.content is string else '' %}
    {%- if m.role == 'user' or (m.role == 'system' and not loop.first) %}
        {{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
    {%- elif m.role == 'assistant' %}
        {%- set thought = m.reasoning_content if m.reasoning_content is string else '' %}
        {%- if not thought and '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {{- '<|im_start|>assistant\\n' }}
        {#- answer -#}
        {%- if loop.index0 > ns.asked and (loop.last or thought) %}
            {{- '<think>\\n' + thought.strip('\\n') + '\\n</think>\\n\\n' }}
        {%- endif %}
        {{- content }}
        {%- if m.tool_calls %}
            {%- for call in m.tool_calls %}
                {%- if not loop.first or content %}{{- '\\n' }}{%- endif %}
                {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
                {%- if call.function.arguments is string %}{{- call.function.arguments }}
                {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
                {{- '}\\n</tool_call>' }}
            {%- endfor %}
        {%- endif %}
        {{- '<|im_end|>\\n' }}
        {#- end -#}
    {%- elif m.role == 'tool' %}
        {{- '<|im_start|>user\\n<tool_response>\\n' + content }}
        {{- '\\n</tool_response><|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
DEEPSEEK = """{%- set ns = namespace(intro='', after_tool=false) %}
{%- for m in messages %}{%- if m.role == 'system' %}{%- set ns.intro = m.content %}{%- endif %}
{%- endfor %}{{- bos_token }}{{- ns.intro }}
{%- for m in messages %}
    {%- if m.role == 'user' %}{%- set ns.after_tool = false %}{{- '<｜User｜>' + m.content }}
    {%- elif m.role == 'tool' %}{%- set ns.after_tool = true %}{{- '<out>' + m.content + '</out>' }}
    {%- elif m.role == 'assistant' and m.tool_calls %}
        {%- if not ns.after_tool %}{{- '<｜Assistant｜>' }}{%- endif %}
        {%- set ns.after_tool = false %}{#- answer -#}{{- (m.content or '').split('</think>')[-1] }}
        {%- for call in m.tool_calls %}
            {{- '<call>' + call.function.name + '\\n' }}
            {{- call.function.arguments if call.function.arguments is string
                else call.function.arguments | tojson }}{{- '</call>' }}
        {%- endfor %}{{- eos_token }}{#- end -#}
    {%- elif m.role == 'assistant' %}
        {%- set content = (m.content or '').split('</think>')[-1] %}
        {%- if not ns.after_tool %}{{- '<｜Assistant｜>' }}{%- endif %}
        {%- set ns.after_tool = false %}{#- answer -#}{{- content + eos_token }}{#- end -#}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt and not ns.after_tool %}{{- '<｜Assistant｜><think>\\n' }}{%- endif %}"""
GPT_OSS = """{%- macro message(role, channel, text, end) %}
{{- '<|start|>' + role + ('<|channel|>' + channel if channel else '') }}
{{- '<|message|>' + text + end }}
{%- endmacro %}
{{- message('system', '', 'Current date: ' + strftime_now('%Y-%m-%d'), '<|end|>') }}
{%- if tools %}{{- message('developer', '', tools | tojson, '<|end|>') }}{%- endif %}
{%- for m in messages %}
    {%- if m.role == 'assistant' and 'tool_calls' in m %}
        {%- if 'thinking' in m %}{{- message('assistant', 'analysis', m.thinking, '<|end|>') }}
        {%- endif %}
        {{- message('assistant to=' + m.tool_calls[0].function.name, 'commentary',
                    m.tool_calls[0].function.arguments | tojson, '<|end|>') }}
    {%- elif m.role == 'assistant' %}
        {%- if loop.last and not add_generation_prompt %}
            {%- if 'thinking' in m %}{{- message('assistant', 'analysis', m.thinking, '<|end|>') }}
            {%- endif %}
            {{- message('assistant', 'final', m.content or '', '<|return|>') }}
        {%- else %}{{- message('assistant', 'final', m.content or '', '<|end|>') }}{%- endif %}
    {%- else %}{{- message(m.role, '', m.content, '<|end|>') }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""
ZEPHYR = """{% for m in messages %}
{% if m['role'] == 'tool' %}
{% continue %}
{% endif %}
{{ '<|' + m['role'] + '|>\\n' + (m['content'] or '') + eos_token }}
{% if loop.last and add_generation_prompt %}
{{ '<|assistant|>' }}
{% endif %}
{% endfor %}"""

TEMPLATES = {
    "chatml": CHATML,
    "llama2": LLAMA2,
    "llama3": LLAMA3,
    "mistral": MISTRAL,
    "qwen3": QWEN3,
    "deepseek": DEEPSEEK,
    "gpt-oss": GPT_OSS,
    "zephyr": ZEPHYR,
}


def tagged(template: str) -> str:
    """Return the template with ``generation`` tags, at the places of its comments."""
    template = template.replace("{#- answer -#}", "{%- generation -%}")
    return template.replace("{#- end -#}", "{%- endgeneration -%}")
